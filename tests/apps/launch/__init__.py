"""launch/ and what it uses: files as they are read, signals through real launchers, and runs between two hosts."""
