def write_page(path, found): path.write_text(repr(found))
