"""A recipe and a checkpoint's headers in; sizes, disk, memory and time out. No weight is read."""
