"""The real trainer in real processes, broken on purpose.

Some of each fault with every `make test`, all of them with `make test-faults`.
"""
