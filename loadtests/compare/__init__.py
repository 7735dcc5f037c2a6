"""Models, precisions, servers or commits against each other: measured in blocks, judged by intervals."""
