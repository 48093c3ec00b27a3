"""Collections of tasks: labelled texts and styles on disk."""
