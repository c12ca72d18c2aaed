"""Sources → a labeled, checked, deduplicated and split data set."""
