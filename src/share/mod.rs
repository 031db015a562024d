//! One camera for many processes.

// loom's atomic words are no words that two processes could share: of all this it sees the ring.
#[cfg(not(loom))]
mod entry;
mod ring;
mod wire;
