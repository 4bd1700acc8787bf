"""From records to tables and pictures. Reads files only, and never imports torch.

records    finds runs, as directories or packed into one file
table      runs side by side, as `python -m adafrugal.reports` prints them; summary: one run
arms       the runs that a command would make, known by their settings
plan       the pages of experiments/tables, with the runs that belong to each
layouts    the tables of a page; claims, pictures: what else it shows
pages      writes them, and gpu's page of what `make gpu` measured
grid, statistics    a table in three formats; means and paired differences
"""
