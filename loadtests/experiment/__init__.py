"""What is measured: arms, blocks, server processes, and how they are kept."""
