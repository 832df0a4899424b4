"""The command line: `lcpt COMMAND …`, and the same as scripts in launch/ and tools/ of a checkout."""
