"""Every door of ringfence, given what people, editors, servers and full disks make of good input."""
