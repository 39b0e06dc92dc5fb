"""Makes the files of a release from the last commit: `make release`."""
