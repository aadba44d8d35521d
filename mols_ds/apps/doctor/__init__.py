"""`mols-ds doctor`: what is installed and usable here, and what is wrong with a config, each finding with its fix."""
