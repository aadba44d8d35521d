"""Tests of launch/: its files, signals through real launchers, and runs on two hosts."""
