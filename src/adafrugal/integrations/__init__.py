"""Frugal in other people's trainers: a module for each, which imports that library and `adafrugal.optim`."""
