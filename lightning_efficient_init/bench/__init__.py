"""``efficient-init bench``: the product measures itself, beside what there is without it.

model's name -> files (files.py) -> ways (ways.py, peers.py), each in a fresh process (row.py, run.py),
beside the machine's own limits (limits.py) -> results (results.py), drawn (chart.py)
"""
