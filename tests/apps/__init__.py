"""The main job: its parts as units, and whole commands as a user types them."""
