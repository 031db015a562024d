//! Sums, each buffer counted once.

use std::collections::{BTreeMap, BTreeSet};

use super::{Inventory, Process};

/// Buffers and their bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sum {
    /// How many buffers.
    pub buffers: u64,
    /// Their bytes, without those of buffers whose size is not known.
    pub bytes: u64,
}

impl Sum {
    fn add(&mut self, bytes: u64) {
        self.buffers += 1;
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

/// The buffers that one exporter made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExporterSum {
    /// Its name; `None` for buffers that do not tell it.
    pub exporter: Option<String>,
    /// Its buffers.
    pub sum: Sum,
}

/// The buffers that one process holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ProcessSum {
    /// Who.
    pub process: Process,
    /// Its descriptors of dma-bufs.
    pub fds: u64,
    /// Its mappings of dma-bufs.
    pub maps: u64,
    /// The buffers that it holds, those that others hold as well included.
    pub sum: Sum,
    /// The same bytes, each buffer's divided by the number of processes that hold it. The shares of all processes add up to the
    /// bytes that processes hold.
    pub share: u64,
}

/// The sums of an [`Inventory`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// All buffers.
    pub all: Sum,
    /// Those that no process holds, as far as processes could be looked at.
    pub unheld: Sum,
    /// How many buffers have no known size.
    pub unsized_buffers: u64,
    /// By exporter, most bytes first.
    pub exporters: Vec<ExporterSum>,
    /// By process, most bytes first.
    pub processes: Vec<ProcessSum>,
}

impl Totals {
    /// Adds up an inventory.
    pub fn of(inventory: &Inventory) -> Totals {
        let mut totals = Totals::default();
        let mut exporters: BTreeMap<Option<&str>, Sum> = BTreeMap::new();
        let mut processes: BTreeMap<&Process, ProcessSum> = BTreeMap::new();
        let mut counted = BTreeSet::new();
        for listed in inventory.buffers.iter().filter(|listed| counted.insert(listed.inode)) {
            let bytes = listed.size.unwrap_or(0);
            totals.all.add(bytes);
            totals.unsized_buffers += u64::from(listed.size.is_none());
            exporters.entry(listed.exporter.as_deref()).or_default().add(bytes);
            if listed.holders.is_empty() {
                totals.unheld.add(bytes);
            }
            let holders = listed.holders.len() as u64;
            for (place, holder) in (0_u64..).zip(&listed.holders) {
                let sum = processes.entry(&holder.process).or_insert_with(|| ProcessSum {
                    process: holder.process.clone(),
                    fds: 0,
                    maps: 0,
                    sum: Sum::default(),
                    share: 0,
                });
                sum.sum.add(bytes);
                sum.fds += holder.fds.len() as u64;
                sum.maps += holder.maps.len() as u64;
                // What does not divide goes to the first, a byte each, so that the shares add up.
                let share = bytes / holders + u64::from(place < bytes % holders);
                sum.share = sum.share.saturating_add(share);
            }
        }
        totals.exporters = exporters
            .into_iter()
            .map(|(exporter, sum)| ExporterSum { exporter: exporter.map(str::to_owned), sum })
            .collect();
        totals.processes = processes.into_values().collect();
        // Both sorts are stable: equals stay in the order of name and number.
        totals.exporters.sort_by_key(|exporter| std::cmp::Reverse(exporter.sum.bytes));
        totals.processes.sort_by_key(|process| std::cmp::Reverse(process.sum.bytes));
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Holder, Listed, Map};
    use super::*;
    use proptest::prelude::*;

    fn listed(inode: u64, size: Option<u64>, exporter: &str, pids: &[i32]) -> Listed {
        let holder = |pid: &i32| Holder {
            process: Process { pid: *pid, ..Process::default() },
            fds: vec![3, 4],
            maps: vec![Map::default()],
        };
        let holders = pids.iter().map(holder).collect();
        Listed { inode, size, exporter: Some(exporter.to_owned()), holders, ..Listed::default() }
    }

    #[test]
    fn shared_buffers_count_once_in_all_and_in_each_process() {
        let buffers = vec![
            listed(1, Some(4097), "system", &[10, 11]),
            listed(2, Some(8192), "udmabuf", &[11]),
            listed(3, Some(4096), "drm", &[]),
            listed(4, None, "drm", &[11]),
        ];
        let totals = Totals::of(&Inventory { buffers, ..Inventory::default() });
        assert_eq!(totals.all, Sum { buffers: 4, bytes: 16_385 });
        assert_eq!(totals.unheld, Sum { buffers: 1, bytes: 4096 });
        assert_eq!(totals.unsized_buffers, 1);
        let exporters: Vec<_> = totals
            .exporters
            .iter()
            .map(|exporter| (exporter.exporter.as_deref(), exporter.sum.buffers, exporter.sum.bytes))
            .collect();
        assert_eq!(exporters, [(Some("udmabuf"), 1, 8192), (Some("system"), 1, 4097), (Some("drm"), 2, 4096)]);
        let processes: Vec<_> = totals
            .processes
            .iter()
            .map(|sum| (sum.process.pid, sum.sum.buffers, sum.sum.bytes, sum.share, sum.fds, sum.maps))
            .collect();
        assert_eq!(processes, [(11, 3, 12_289, 10_240, 6, 3), (10, 1, 4097, 2049, 2, 1)]);
    }

    fn size() -> impl Strategy<Value = u64> {
        prop_oneof![0..10_000_u64, Just(u64::MAX)]
    }

    proptest! {
        #[test]
        fn shares_add_up(
            buffers in prop::collection::vec(
                (0_u64..8, prop::option::of(size()), prop::collection::btree_set(0_i32..5, 0..5)),
                0..10,
            )
        ) {
            let buffers: Vec<_> = buffers
                .into_iter()
                .map(|(inode, size, pids)| listed(inode, size, "x", &pids.into_iter().collect::<Vec<_>>()))
                .collect();
            let totals = Totals::of(&Inventory { buffers: buffers.clone(), ..Inventory::default() });
            let inodes: BTreeSet<_> = buffers.iter().map(|listed| listed.inode).collect();
            prop_assert_eq!(totals.all.buffers, inodes.len() as u64);
            let by_exporter: u64 = totals.exporters.iter().map(|exporter| exporter.sum.buffers).sum();
            prop_assert_eq!(by_exporter, totals.all.buffers);
            if totals.all.bytes < u64::MAX {
                let shares: u64 = totals.processes.iter().map(|sum| sum.share).sum();
                prop_assert_eq!(shares + totals.unheld.bytes, totals.all.bytes);
            }
        }
    }
}
