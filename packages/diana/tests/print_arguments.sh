#!/usr/bin/env bash
# Stands in for python in the tests of the shell scripts: prints its arguments, NUL between them.
exec "$REAL_PYTHON" -c "$PRINTER" "$@"
