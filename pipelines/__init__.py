"""CondPDiffPipeline and its output."""
