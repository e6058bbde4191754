"""Files: places (paths and URLs), named arrays, JSON records and locks."""
