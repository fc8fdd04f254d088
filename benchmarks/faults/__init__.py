"""Kills, signals, damaged files, full disks and twins, at random but the same in every run."""
