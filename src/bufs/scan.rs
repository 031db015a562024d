//! Looks at every process and at debugfs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::sys::stat::{major, minor};

use super::parse::{self, BufInfo, MapLine};
use super::{Holder, Inventory, Listed, Map, Process, Unseen};
use crate::error::{Context, Kind, Result};

const PROC: &str = "/proc";
const BUFINFO: &str = "/sys/kernel/debug/dma_buf/bufinfo";

impl Inventory {
    /// Looks at every process and at debugfs. Cost: for each process its list of descriptors, a `readlink` for each, and its
    /// mappings; four more calls for each dma-buf. The kernel locks each dma-buf's reservation for a moment, twice.
    ///
    /// # Errors
    /// When `/proc` cannot be listed. What may not be read is no error: see [`Unseen`].
    pub fn take() -> Result<Inventory> {
        take(Path::new(PROC), Path::new(BUFINFO))
    }
}

fn take(proc: &Path, bufinfo: &Path) -> Result<Inventory> {
    // Twice: what no process holds is listed only if it was there before and after they were looked at. Otherwise a
    // buffer that was made meanwhile would seem to be held by nobody.
    let before = read_bufinfo(bufinfo);
    let mut scan = Scan::default();
    let entries = fs::read_dir(proc).context("list the processes in", || proc.display().to_string())?;
    for entry in entries {
        let entry = entry.context("list the processes in", || proc.display().to_string())?;
        if let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
            scan.process(&entry.path(), pid);
        }
    }
    scan.unseen.proc = hidden_processes(proc);
    let after = read_bufinfo(bufinfo);
    match (before, after) {
        (Ok(before), Ok(after)) => {
            scan.place_maps(Some(&after));
            scan.add(before, after);
        }
        (Err(why), _) | (_, Err(why)) => {
            scan.place_maps(None);
            scan.unseen.debugfs = Some(why);
        }
    }
    Ok(scan.end())
}

/// All of a file of the kernel's, in few calls: such a file tells no length beforehand.
fn contents(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::with_capacity(16 * 1024);
    File::open(path)?.read_to_end(&mut text)?;
    Ok(text)
}

fn read_bufinfo(path: &Path) -> Result<BufInfo, String> {
    let text = contents(path).context("read", || path.display().to_string());
    let text = text.map_err(|error| match error.kind() {
        Kind::Permission => error.repair("debugfs is for root").line(),
        Kind::NotFound => error.repair("mount -t debugfs debugfs /sys/kernel/debug").line(),
        _ => error.line(),
    });
    let found = parse::bufinfo(&text?);
    match found.total {
        Some(total) if total != found.buffers.len() as u64 => {
            Err(format!("{} lists {total} buffers in a form that is not known", path.display()))
        }
        _ => Ok(found),
    }
}

/// Whether `/proc` is mounted so that it hides the processes of others.
fn hidden_processes(proc: &Path) -> Option<String> {
    let mounts = fs::read_to_string(proc.join("self/mounts")).ok()?;
    let is_hidden = mounts.lines().any(|line| {
        let fields: Vec<_> = line.split(' ').collect();
        let [_, "/proc", "proc", options, ..] = fields.as_slice() else { return false };
        options
            .split(',')
            .any(|option| matches!(option, "hidepid=2" | "hidepid=invisible" | "hidepid=4" | "hidepid=ptraceable"))
    });
    // Root, and the group that the mount names, see all the same; only this process's own view tells.
    let sees_the_first = proc.join("1").exists();
    (is_hidden && !sees_the_first).then(|| "/proc hides the processes of other users (hidepid)".to_owned())
}

/// A mapping whose buffer may not be known yet.
struct Candidate {
    process: Process,
    line: MapLine,
    /// Where the kernel has a link to what is mapped; root's alone.
    link: PathBuf,
}

#[derive(Default)]
struct Scan {
    buffers: BTreeMap<u64, Listed>,
    candidates: Vec<Candidate>,
    /// The device of the kernel's dma-buf file system.
    device: Option<(u32, u32)>,
    unseen: Unseen,
}

impl Scan {
    fn process(&mut self, folder: &Path, pid: i32) {
        let Some(stat) = contents(&folder.join("stat")).ok().and_then(|text| parse::stat(&text)) else { return };
        if stat.is_kernel {
            return;
        }
        let process = Process { pid, start: stat.start, name: stat.name };
        let looked = self
            .descriptors(folder, &process)
            .and_then(|()| self.mappings(folder, &process));
        match looked {
            Ok(()) => {}
            // It has ended.
            Err(error) if matches!(error.raw_os_error(), Some(nix::libc::ENOENT | nix::libc::ESRCH)) => {}
            Err(error) => self.unseen.processes.push((process, error.to_string())),
        }
    }

    fn descriptors(&mut self, folder: &Path, process: &Process) -> io::Result<()> {
        for entry in fs::read_dir(folder.join("fd"))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default();
            let Some(fd) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            // A link that is gone is a descriptor that was closed meanwhile.
            let Ok(target) = fs::read_link(&path) else { continue };
            if !target.as_os_str().as_bytes().starts_with(parse::DMA_BUF_PATH) {
                continue;
            }
            let Ok(text) = contents(&folder.join("fdinfo").join(name)) else { continue };
            let Some(found) = parse::fdinfo(&text) else { continue };
            let metadata = fs::metadata(&path).ok();
            let Some(inode) = found.inode.or_else(|| metadata.as_ref().map(Metadata::ino)) else { continue };
            let listed = self.listed(inode);
            listed.size = Some(found.size);
            listed.references = found.references.or(listed.references);
            listed.exporter = Some(found.exporter);
            listed.name = found.name;
            holder(listed, process).fds.push(fd);
            if let Some(metadata) = metadata.filter(|metadata| metadata.ino() == inode) {
                listed.made = made(&metadata);
                self.device = Some(device(&metadata));
            }
        }
        Ok(())
    }

    fn mappings(&mut self, folder: &Path, process: &Process) -> io::Result<()> {
        for line in parse::maps(&contents(&folder.join("maps"))?) {
            let link = folder.join(format!("map_files/{:x}-{:x}", line.start, line.end));
            self.candidates.push(Candidate { process: process.clone(), line, link });
        }
        Ok(())
    }

    /// Gives the mappings to their buffers, those of files that are only called like a dma-buf left out.
    fn place_maps(&mut self, bufinfo: Option<&BufInfo>) {
        let known: Option<BTreeSet<u64>> =
            bufinfo.map(|bufinfo| bufinfo.buffers.iter().map(|entry| entry.inode).collect());
        for Candidate { process, line, link } in std::mem::take(&mut self.candidates) {
            let is_dma_buf = match (self.device, &known) {
                (Some(device), _) => device == line.device,
                (None, Some(known)) => known.contains(&line.inode),
                // Of those with a device of their own; most file systems on disks are none of these.
                (None, None) => line.device.0 == 0,
            };
            if !is_dma_buf {
                continue;
            }
            let listed = self.listed(line.inode);
            if listed.made.is_none()
                && let Ok(metadata) = fs::metadata(&link)
                && metadata.ino() == line.inode
            {
                listed.made = made(&metadata);
                listed.size = listed.size.or(Some(metadata.size()));
            }
            if listed.exporter.is_none() && listed.name.is_none() {
                listed.name = line.name;
            }
            let map = Map { offset: line.offset, bytes: line.end - line.start, access: line.access };
            holder(listed, &process).maps.push(map);
        }
    }

    fn add(&mut self, before: BufInfo, after: BufInfo) {
        let before: BTreeSet<u64> = before.buffers.iter().map(|entry| entry.inode).collect();
        for entry in after.buffers {
            if !self.buffers.contains_key(&entry.inode) && !before.contains(&entry.inode) {
                continue;
            }
            let listed = self.listed(entry.inode);
            // A descriptor's information tells where a name ends; here it may end too early.
            if listed.exporter.is_none() {
                listed.name = entry.name;
            }
            listed.size = listed.size.or(Some(entry.size));
            listed.exporter.get_or_insert(entry.exporter);
            listed.references = listed.references.or(entry.references);
            listed.devices = Some(entry.devices);
        }
    }

    fn listed(&mut self, inode: u64) -> &mut Listed {
        self.buffers
            .entry(inode)
            .or_insert_with(|| Listed { inode, ..Listed::default() })
    }

    fn end(self) -> Inventory {
        let mut buffers: Vec<_> = self.buffers.into_values().collect();
        for holder in buffers.iter_mut().flat_map(|listed| &mut listed.holders) {
            holder.fds.sort_unstable();
        }
        for listed in &mut buffers {
            listed.holders.sort_by(|a, b| a.process.cmp(&b.process));
        }
        let mut unseen = self.unseen;
        unseen.processes.sort();
        Inventory { buffers, unseen }
    }
}

fn holder<'a>(listed: &'a mut Listed, process: &Process) -> &'a mut Holder {
    let known = listed.holders.iter().position(|holder| holder.process == *process);
    let place = known.unwrap_or_else(|| {
        listed.holders.push(Holder { process: process.clone(), ..Holder::default() });
        listed.holders.len() - 1
    });
    &mut listed.holders[place]
}

fn made(metadata: &Metadata) -> Option<SystemTime> {
    let seconds = u64::try_from(metadata.ctime()).ok()?;
    let nanoseconds = u32::try_from(metadata.ctime_nsec()).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds))
}

fn device(metadata: &Metadata) -> (u32, u32) {
    let number = |part: u64| u32::try_from(part).unwrap_or(u32::MAX);
    (number(major(metadata.dev())), number(minor(metadata.dev())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const FDINFO: &str = "pos:\t0\nino:\t5\nsize:\t8192\ncount:\t4\nexp_name:\tsystem\nname:\ta b\n";
    const STAT: &str = "S 1 0 0 0 -1 4194560 158 0 5 0 27 16 0 0 20 0 1 0 637 5537792 883\n";

    /// A `/proc` with two processes that hold buffer 5, one that has ended, and one that may not be read.
    fn machine(name: &str) -> PathBuf {
        let root = std::env::temp_dir().join(format!("dmaflow-bufs-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        for pid in [10, 11] {
            let folder = root.join(pid.to_string());
            fs::create_dir_all(folder.join("fd")).unwrap();
            fs::create_dir_all(folder.join("fdinfo")).unwrap();
            fs::write(folder.join("stat"), format!("{pid} (x {pid}) {STAT}")).unwrap();
            symlink("/dmabuf:a b", folder.join("fd/7")).unwrap();
            symlink("/dev/null", folder.join("fd/1")).unwrap();
            fs::write(folder.join("fdinfo/7"), FDINFO).unwrap();
            fs::write(
                folder.join("maps"),
                "7f00-9f00 rw-s 00000000 00:0b 5   /dmabuf:a b\n7f00-8f00 rw-s 00000000 08:01 6   /dmabuf:file\n",
            )
            .unwrap();
        }
        fs::create_dir_all(root.join("12")).unwrap();
        fs::write(root.join("12/stat"), format!("12 (gone) {STAT}")).unwrap();
        fs::create_dir_all(root.join("13")).unwrap();
        fs::write(root.join("13/stat"), format!("13 (odd) {STAT}")).unwrap();
        // A file where a folder is read: an error that is not "it has ended".
        fs::write(root.join("13/fd"), "").unwrap();
        fs::create_dir_all(root.join("sys")).unwrap();
        root
    }

    fn bufinfo(inodes: &[u64]) -> String {
        let rows = inodes.iter().map(|inode| {
            format!(
                "00008192\t00000002\t00080007\t00000004\tsystem\t{inode:08}\t<none>\n\
                \tAttached Devices:\n\tvkms\nTotal 1 devices attached\n\n"
            )
        });
        format!("\nDma-buf Objects:\n{}\nTotal {} objects, 0 bytes\n", rows.collect::<String>(), inodes.len())
    }

    #[test]
    fn a_buffer_is_listed_once_with_all_its_holders() {
        let root = machine("once");
        let file = root.join("bufinfo");
        fs::write(&file, bufinfo(&[5, 9])).unwrap();
        let inventory = take(&root, &file).unwrap();
        fs::remove_dir_all(&root).unwrap();
        let [held, kernel] = inventory.buffers.as_slice() else { panic!("{inventory:?}") };
        assert_eq!((held.inode, held.size, held.name.as_deref()), (5, Some(8192), Some("a b")));
        assert_eq!(held.devices.as_deref(), Some(&["vkms".to_owned()][..]));
        let holders: Vec<_> = held
            .holders
            .iter()
            .map(|holder| (holder.process.pid, holder.fds.as_slice(), holder.maps.len()))
            .collect();
        assert_eq!(holders, [(10, &[7][..], 1), (11, &[7][..], 1)]);
        assert_eq!((kernel.inode, kernel.holders.len(), kernel.made), (9, 0, None));
        assert_eq!(inventory.unseen.debugfs, None);
        let hidden: Vec<_> = inventory.unseen.processes.iter().map(|(process, _)| process.pid).collect();
        assert_eq!(hidden, [13]);
    }

    #[test]
    fn without_debugfs_it_says_so() {
        let root = machine("without");
        let inventory = take(&root, &root.join("bufinfo")).unwrap();
        // A form that is not known is not read in part.
        fs::write(root.join("bufinfo"), bufinfo(&[5]).replace("Total 1 objects", "Total 2 objects")).unwrap();
        let odd = take(&root, &root.join("bufinfo")).unwrap();
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(inventory.buffers.len(), 1);
        assert_eq!(inventory.buffers[0].devices, None);
        assert!(inventory.unseen.debugfs.unwrap().contains("bufinfo"));
        assert!(odd.unseen.debugfs.unwrap().contains("2 buffers"));
    }

    #[test]
    fn this_machine_can_be_looked_at() {
        let inventory = Inventory::take().unwrap();
        assert!(inventory.buffers.is_sorted_by_key(|listed| listed.inode));
    }
}
