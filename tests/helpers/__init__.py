"""What tests share: models, rows, runs and folders that they make, naive forms, and servers."""
