"""One experiment: seeds trained, saved and resumed, on several processes; models scored, asked, exported."""
