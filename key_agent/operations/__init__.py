"""What an administrator's commands do, in the agent that runs or in a process of their own."""
