"""Make tables and pictures from records. Reads files only, and never imports torch.

records    finds runs, as directories or packed into one file
table      runs side by side, as `python -m adafrugal.reports` prints them; summary: one run
arms       the runs that a command would make, identified by their settings
descent    the search for an arm's rates, replayed from losses; searches: its trials among the records
page_file  the keys of a page's file; plan: pages with the runs that belong to each
layouts    the tables of a page; cells: their columns; decisions, lengths, spreads: those of a test, of several lengths,
           and of two kinds of seeds
best       arms at the best of a grid, or at the rates that another section found; origin: what made a table's runs
claims     the papers' claims on a table
pictures   a run, or a table's arms; losses over the steps; curves, frontier: a search, and loss against state, with
           names placed by labels
pages      writes them, and gpu's page of the measurements of `make gpu`
grid, statistics    a table in three formats; means, paired differences, p values, crossings
"""

import adafrugal.settings  # noqa: F401  first, since it says what to install if packages are missing
