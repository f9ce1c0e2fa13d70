"""Known crystals by the DOS of their sites: the index (`index`), how it is made (`build`), queries (`query`)."""
