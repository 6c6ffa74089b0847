"""Web applications: their pages pass, the files in their forms and uploads are sealed."""
