"""Where metrics and episodes go: console, files and experiment trackers."""
