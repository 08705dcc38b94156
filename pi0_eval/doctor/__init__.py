"""Why a trained policy does not move the robot as it should: `pi0-doctor`."""
