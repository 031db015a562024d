//! Device nodes: how they are listed, and how the one that a person means is found.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

/// All nodes called `prefix` and a number in a folder, by number.
pub(crate) fn numbered(folder: &str, prefix: &str) -> Vec<PathBuf> {
    let number = |path: &Path| path.file_name()?.to_str()?.strip_prefix(prefix)?.parse::<u32>().ok();
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut nodes: Vec<_> = entries
        .filter_map(|entry| Some((number(&entry.path())?, entry.path())))
        .collect();
    nodes.sort();
    nodes.into_iter().map(|(_, path)| path).collect()
}

/// A sort of device that can be looked for by name.
pub(crate) trait Named: Sized {
    /// The sort, with its article: `a camera`.
    const WHAT: &'static str;
    /// What to do where there is none.
    const NONE: &'static str;

    /// Opens a node.
    fn open(path: &Path) -> Result<Self>;

    /// What it is called: the driver's name first, then the card's, if it has one.
    fn names(&self) -> Vec<&str>;

    /// Path and driver, for a list of those that are there.
    fn describe(&self) -> String;

    /// Whether the two are nodes of one device: then the first of them is meant by its name.
    fn is_same(&self, _other: &Self) -> bool {
        false
    }
}

/// How well a name fits what a device is called, the best first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Fit {
    /// It is the name of the driver or of the card.
    Whole,
    /// It is words of the card's name, one after another.
    Words,
}

/// How well `name` fits, the case of letters aside. Words are runs of letters and digits.
fn fit(name: &str, names: &[&str]) -> Option<Fit> {
    let name = name.trim().to_lowercase();
    if name.is_empty() {
        return None;
    }
    if names.iter().any(|known| known.trim().to_lowercase() == name) {
        return Some(Fit::Whole);
    }
    let part = words(&name);
    let has = |known: &&str| words(&known.to_lowercase()).windows(part.len().max(1)).any(|run| run == part);
    names.iter().skip(1).any(has).then_some(Fit::Words)
}

fn words(name: &str) -> Vec<String> {
    let words = name.split(|letter: char| !letter.is_alphanumeric());
    words.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// The device that a person calls `name`: a path, a node's name, or what the device is called. A whole name goes before words of one.
///
/// # Errors
/// [`Kind::NotFound`], naming those that are there; for a path what opening it says. If nothing is there that may be opened, why
/// the first could not be. [`Kind::Invalid`] for a name without a letter, and for one that several have, naming them.
pub(crate) fn find<D: Named>(name: &str, nodes: &[PathBuf]) -> Result<D> {
    if name.contains('/') {
        return D::open(Path::new(name));
    }
    let wrong =
        |why: &'static str| Error::new(Kind::Invalid, "find", format!("{} called \"{name}\"", D::WHAT)).because(why);
    if words(name).is_empty() {
        return Err(wrong("that is no name"));
    }
    let mut refused = None;
    let mut there = Vec::new();
    let mut found: Vec<(Fit, D)> = Vec::new();
    for path in nodes {
        let is_node = path.file_name().is_some_and(|node| node == name);
        match D::open(path) {
            Ok(device) if is_node => return Ok(device),
            Ok(device) => {
                there.push(device.describe());
                let fits = fit(name, &device.names());
                found.extend(fits.map(|fit| (fit, device)));
            }
            Err(error) if is_node => return Err(error),
            // A node of another sort is not an answer; one that may not be opened could be the one.
            Err(error) if error.kind() == Kind::Unsupported => {}
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    if let Some(best) = found.iter().map(|(fit, _)| *fit).min() {
        let mut distinct: Vec<D> = Vec::with_capacity(1);
        for (_, device) in found.into_iter().filter(|(fit, _)| *fit == best) {
            if !distinct.iter().any(|known| known.is_same(&device)) {
                distinct.push(device);
            }
        }
        let candidates: Vec<_> = distinct.iter().map(Named::describe).collect();
        return match (distinct.pop(), distinct.is_empty()) {
            (Some(device), true) => Ok(device),
            _ => Err(wrong("several are called so").repair(format!("name one of them: {}", candidates.join(", ")))),
        };
    }
    if let (true, Some(error)) = (there.is_empty(), refused) {
        return Err(error);
    }
    let repair = match there.as_slice() {
        [] => D::NONE.to_owned(),
        _ => format!("there is {}", there.join(", ")),
    };
    Err(Error::new(Kind::NotFound, "find", format!("{} called \"{name}\"", D::WHAT)).repair(repair))
}

/// Every device of the sort, open, or why it could not be opened; nodes of another sort are left out.
pub(crate) fn all<D: Named>(nodes: &[PathBuf]) -> Vec<Result<D>> {
    let opened = nodes.iter().map(|path| D::open(path));
    opened
        .filter(|device| !matches!(device, Err(error) if error.kind() == Kind::Unsupported))
        .collect()
}

/// The first device that can be opened.
///
/// # Errors
/// [`Kind::NotFound`] if there is none; if there are some and none may be opened, why the first could not be.
pub(crate) fn first<D: Named>(nodes: &[PathBuf]) -> Result<D> {
    let mut refused = None;
    for path in nodes {
        match D::open(path) {
            Ok(device) => return Ok(device),
            Err(error) if error.kind() == Kind::Unsupported => {}
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    let none = || Error::new(Kind::NotFound, "find", format!("{} to use when none is named", D::WHAT)).repair(D::NONE);
    Err(refused.unwrap_or_else(none))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_sorted_by_number_and_nothing_else_is_taken() {
        let folder = std::env::temp_dir().join(format!("dmaflow-nodes-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        for name in ["video10", "video2", "video", "videox", "vbi0"] {
            fs::write(folder.join(name), "").unwrap();
        }
        let found = numbered(folder.to_str().unwrap(), "video");
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(found, [folder.join("video2"), folder.join("video10")]);
    }

    #[derive(Debug)]
    struct Odd(PathBuf);

    impl Named for Odd {
        const WHAT: &'static str = "an odd one";
        const NONE: &'static str = "make one";

        fn open(path: &Path) -> Result<Odd> {
            let number = path.display().to_string().bytes().last().unwrap_or(0);
            match number % 2 {
                1 => Ok(Odd(path.to_owned())),
                _ => Err(Error::new(Kind::Permission, "open", path.display().to_string())),
            }
        }

        fn names(&self) -> Vec<&str> {
            match self.0.to_str() {
                Some("/dev/n1") => vec!["odd", "Integrated Camera: HD"],
                Some("/dev/n3" | "/dev/twin3") => vec!["odder", "Camera"],
                _ => vec!["oddest", "Integrated IR camera"],
            }
        }

        fn describe(&self) -> String {
            self.0.display().to_string()
        }

        fn is_same(&self, other: &Odd) -> bool {
            self.names() == other.names()
        }
    }

    #[test]
    fn the_one_that_is_meant_or_what_there_is() {
        let nodes = ["/dev/n0", "/dev/n1", "/dev/n3"].map(PathBuf::from);
        for (name, node) in
            [("odd", 1), ("ODD", 1), ("odder", 2), ("camera", 2), ("integrated camera: hd", 1), ("hd", 1)]
        {
            assert_eq!(find::<Odd>(name, &nodes).unwrap().0, nodes[node], "{name}");
        }
        for name in ["", " ", ":"] {
            assert_eq!(find::<Odd>(name, &nodes).unwrap_err().kind(), Kind::Invalid, "{name:?}");
        }
        // Parts of words, words that do not follow each other, and words of a driver's name are no names.
        for name in ["o", "i", "dd", "camer", "integrated hd", "odd camera"] {
            assert_eq!(find::<Odd>(name, &nodes).unwrap_err().kind(), Kind::NotFound, "{name}");
        }
        let two = ["/dev/n1", "/dev/n5"].map(PathBuf::from);
        let error = find::<Odd>("integrated", &two).unwrap_err();
        let line =
            "cannot find an odd one called \"integrated\": several are called so (name one of them: /dev/n1, /dev/n5)";
        assert_eq!(error.line(), line);
        let twins = ["/dev/twin3", "/dev/n3"].map(PathBuf::from);
        assert_eq!(find::<Odd>("odder", &twins).unwrap().0, twins[0], "two nodes of one device");
        assert_eq!(find::<Odd>("n3", &twins).unwrap().0, twins[1]);
        assert_eq!(find::<Odd>("n3", &nodes).unwrap().0, nodes[2]);
        assert_eq!(find::<Odd>("n0", &nodes).unwrap_err().kind(), Kind::Permission);
        let error = find::<Odd>("even", &nodes).unwrap_err();
        assert_eq!(error.line(), "cannot find an odd one called \"even\" (there is /dev/n1, /dev/n3)");
        assert_eq!(find::<Odd>("odd", &nodes[..1]).unwrap_err().kind(), Kind::Permission);
        assert_eq!(find::<Odd>("odd", &[]).unwrap_err().known_repair(), Some("make one"));
    }

    #[test]
    fn the_first_that_may_be_opened() {
        let nodes = ["/dev/n0", "/dev/n1"].map(PathBuf::from);
        assert_eq!(first::<Odd>(&nodes).unwrap().0, nodes[1]);
        assert_eq!(first::<Odd>(&nodes[..1]).unwrap_err().kind(), Kind::Permission);
        assert_eq!(first::<Odd>(&[]).unwrap_err().kind(), Kind::NotFound);
    }
}
