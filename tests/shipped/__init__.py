"""Everything that is shipped is run: configs, tutorials, and the commands of every page."""
