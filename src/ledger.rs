//! The account of copies: every byte of a picture that the CPU moved, and why.

/// One cause of copies, with its sum.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Copies {
    /// Why the CPU copied.
    pub cause: &'static str,
    /// How many times.
    pub count: u64,
    /// How many bytes in all.
    pub bytes: u64,
}

/// The account of copies.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ledger {
    entries: Vec<Copies>,
}

impl Ledger {
    /// An empty account.
    pub const fn new() -> Ledger {
        Ledger { entries: Vec::new() }
    }

    /// Enters one copy. Causes are few; each is one line of the account.
    pub fn enter(&mut self, cause: &'static str, bytes: u64) {
        self.add(&Copies { cause, count: 1, bytes });
    }

    /// Enters what another account has of one cause.
    pub fn add(&mut self, copies: &Copies) {
        match self.entries.iter_mut().find(|entry| entry.cause == copies.cause) {
            Some(entry) => {
                entry.count += copies.count;
                entry.bytes += copies.bytes;
            }
            None => self.entries.push(copies.clone()),
        }
    }

    /// All causes with their sums.
    pub fn entries(&self) -> &[Copies] {
        &self.entries
    }

    /// All bytes copied.
    pub fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_add_up() {
        let mut ledger = Ledger::new();
        ledger.enter("png", 10);
        ledger.enter("png", 5);
        ledger.enter("snapshot", 1);
        assert_eq!(ledger.bytes(), 16);
        assert_eq!(ledger.entries()[0], Copies { cause: "png", count: 2, bytes: 15 });
    }
}
