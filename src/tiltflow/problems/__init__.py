"""Problems with known answers, and how far from them a method ends."""
