"""Writes the table into docs/security.md."""

from tests.support.hostile.page import PAGE, page

if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
