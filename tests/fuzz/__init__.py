"""Every door of ringfence, given what people, editors, servers and disks make of good input."""
