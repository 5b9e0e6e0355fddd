"""Rules side by side on one problem."""
