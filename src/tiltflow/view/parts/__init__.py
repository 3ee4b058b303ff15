"""Further parts of the page of `tiltflow view`, one file each: its routes, and a section of the page in a script beside it.

`my_part.py` has a function `routes(view)`, and `my_part.js`, if there is one, is a script of every page that is served; see
`tiltflow.view.server`.
"""
