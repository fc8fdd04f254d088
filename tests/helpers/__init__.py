"""What tests of several folders share: small models and data, stand-ins, damage, pools of ranks."""
