"""The page in the browser: interface only, a tab for each kind of adapters."""
