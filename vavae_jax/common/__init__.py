"""What both packages use and nothing of which knows a model."""
