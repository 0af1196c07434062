"""Routing, what the paper is about.

`router` scores tokens, `decide` says what the scores mean, `capacity` how many tokens a recursion takes, `select` (and
`hidden_rows`, where a mesh splits rows) picks rows and puts them back. `scan` is the reference execution, `gather` the
one that trains; both end in `trace`, the record of where every token went, with `losses` and statistics.
"""
