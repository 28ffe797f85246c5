"""Router anchors, one file each; the file name is `anchor.name`.

`loss(self, targets, forget, forget_ref)` is a pure function of `Forward`s, like an algorithm's; `targets` says which
experts are meant to keep the tokens. It returns the named term `anchor`, already weighted. An anchor with a `basis`
keeps the routers themselves out of a space instead (`constraint.py`).
"""
