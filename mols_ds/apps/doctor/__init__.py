"""`mols-ds doctor`: check the installation, the machine and a config. Every finding names its fix."""
