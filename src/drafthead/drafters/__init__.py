"""Draft heads by kind: what each is, how it is trained, drafts and is stored, a folder each."""
