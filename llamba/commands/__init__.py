"""The commands of `llamba`: a file each, with the arguments; what a command calls is imported when it is called."""
