"""The command line: words in, one call, one result out. Heavy libraries load inside commands only."""
