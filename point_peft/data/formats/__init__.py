"""Readers of files that hold one cloud, one file a family of formats; `point_peft.data.reading` chooses among them."""
