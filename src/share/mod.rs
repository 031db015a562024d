//! One camera for many processes.

mod ring;
mod wire;
