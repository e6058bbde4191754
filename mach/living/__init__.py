"""A model that lives: classes added, removed, renamed and taught while weights stay as they are."""
