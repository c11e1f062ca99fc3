"""A run folder from first to last stage: plan, checks before the first stage, the run itself."""
