"""Typed configuration: every default lives in one of these dataclasses and nowhere else.

The modules here import neither torch nor Megatron, so ``minitron --help`` stays fast.
"""
