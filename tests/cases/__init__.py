"""What tests run on several ranks: functions that the pool of ``tests/helpers/pool.py`` calls.

A rank imports its function by name, so each one is at the top level of a module that needs nothing
of the test. A module has the name of the tests that use it.
"""
