//! The container's root: a staging tmpfs that holds everything of ours, and an overlay of the image above it.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountFlags, MountPropagationFlags, UnmountFlags};

use super::mount;
use super::plan::Plan;
use super::step::{About, Failure};

/// The tmpfs in which the root is put together: `upper` and `work` of the overlay, `dev`, an `empty` directory that
/// masks others, and the places where layers and the root are mounted.
///
/// One file system for all of these, because each one costs 0.03 ms and kernel memory per container. It dies with
/// the container's mount namespace, so there is nothing to clean up.
pub(super) struct Staging {
    root: OwnedFd,
    id_base: u32,
    /// Where `upper` and `work` are when they are not in this tmpfs.
    disk: Option<OwnedFd>,
}

/// Where a directory of the host is attached that holds `upper` and `work`.
const DISK: &str = "disk";

/// The container's root directory, an overlay mount.
pub(super) struct Root {
    fd: OwnedFd,
    id_base: u32,
}

/// The directories of the root on which the kernel's file systems are attached; opened before any volume of the
/// tenant is, so that what is checked is what is used.
pub(super) struct MountPoints {
    /// `/proc`
    pub(super) proc: OwnedFd,
    /// `/dev`
    pub(super) dev: OwnedFd,
    /// `/sys`
    pub(super) sys: OwnedFd,
}

/// Cuts the copied mounts off from the host's: nothing that is mounted or unmounted from here on shows outside.
pub(super) fn make_mounts_private() -> Result<(), Failure> {
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).about("/")
}

impl Staging {
    /// Mounts the tmpfs at the plan's staging directory and makes it the working directory.
    pub(super) fn mount(plan: &Plan) -> Result<Staging, Failure> {
        let size = plan.upper_bytes.to_string();
        let root = mount::new_file_system(
            "tmpfs",
            &[("size", &size), ("mode", "0755")],
            MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV,
        )?;
        mount::attach_at_host_path(root.as_fd(), &plan.staging)?;
        rustix::process::fchdir(&root).about("fchdir")?;
        let staging = Staging { root, id_base: plan.id_base, disk: None };
        for name in ["upper", "work", "dev", "empty", "root"] {
            staging.directory(name)?;
        }
        // The merged root and /dev take their owner from these two.
        for name in ["upper", "dev"] {
            give(staging.root.as_fd(), name, staging.id_base)?;
        }
        Ok(staging)
    }

    /// The upper layer of the overlay to come.
    pub(super) fn upper(&self) -> Result<OwnedFd, Failure> {
        let place = self.disk.as_ref().unwrap_or(&self.root);
        open_directory(place.as_fd(), "upper").about("upper")
    }

    /// Takes `upper` and `work` from a directory of the host.
    pub(super) fn attach_upper(&mut self, directory: BorrowedFd<'_>) -> Result<(), Failure> {
        let place = self.directory(DISK)?;
        mount::attach(directory, place.as_fd()).about("upper layer")?;
        self.disk = Some(open_directory(self.root.as_fd(), DISK).about(DISK)?);
        Ok(())
    }

    /// Attaches the image's layers, lowest first.
    pub(super) fn attach_layers(&self, layers: &[OwnedFd]) -> Result<(), Failure> {
        for (index, layer) in layers.iter().enumerate() {
            let place = self.directory(&index.to_string())?;
            mount::attach(layer.as_fd(), place.as_fd()).about(format!("layer {index}"))?;
        }
        Ok(())
    }

    /// Mounts the overlay of `layers` layers.
    pub(super) fn mount_overlay(&self, layers: usize) -> Result<Root, Failure> {
        // The highest layer comes first. Names are relative and short: all options together must fit a page.
        let lower: Vec<String> = (0..layers).rev().map(|index| index.to_string()).collect();
        // A layer on disk becomes one of an image: nothing in it may mean something only together with those below. Nobody
        // needs it after a crash, so the kernel need not sync it.
        let upper = match self.disk {
            None => "upperdir=upper,workdir=work,redirect_dir=on".to_owned(),
            Some(_) => format!("upperdir={DISK}/upper,workdir={DISK}/work,redirect_dir=off,volatile"),
        };
        let options = format!("lowerdir={},{upper},metacopy=off,index=off,xino=off", lower.join(":"));
        let data = CString::new(options).map_err(|_| Failure::new(libc::EINVAL, "options"))?;
        rustix::mount::mount(
            "overlay",
            "root",
            "overlay",
            MountFlags::NOSUID | MountFlags::NODEV,
            data.as_c_str(),
        )
        .about(format!("{layers} layers"))?;
        let fd = open_directory(self.root.as_fd(), "root").about("root")?;
        Ok(Root { fd, id_base: self.id_base })
    }

    /// The directory for `/dev`'s nodes.
    pub(super) fn dev(&self) -> Result<OwnedFd, Failure> {
        open_directory(self.root.as_fd(), "dev").about("dev")
    }

    /// A new read-only view of the empty directory, to be attached over what a container must not see.
    pub(super) fn mask(&self) -> Result<OwnedFd, Failure> {
        let empty = open_directory(self.root.as_fd(), "empty").about("empty")?;
        let mask = mount::detached_copy(empty.as_fd())?;
        mount::frozen(mask.as_fd())?;
        Ok(mask)
    }

    fn directory(&self, name: &str) -> Result<OwnedFd, Failure> {
        rustix::fs::mkdirat(&self.root, name, Mode::from_raw_mode(0o755)).about(name)?;
        open_directory(self.root.as_fd(), name).about(name)
    }
}

impl Root {
    /// The root directory.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Checks the directories that every container needs, and makes those that the image lacks.
    ///
    /// An image whose `/dev` is a symbolic link has led other runtimes to mount over the host (CVE-2026-41579):
    /// anything but a directory is refused.
    pub(super) fn standard_directories(&self) -> Result<MountPoints, Failure> {
        let points = MountPoints {
            proc: self.top_level("proc", 0o555)?,
            dev: self.top_level("dev", 0o755)?,
            sys: self.top_level("sys", 0o555)?,
        };
        self.top_level("run", 0o755)?;
        self.top_level("etc", 0o755)?;
        let tmp = self.top_level("tmp", 0o1777)?;
        let found = rustix::fs::fstat(&tmp).about("/tmp")?;
        if found.st_mode & 0o7777 != 0o1777 {
            rustix::fs::chmodat(&self.fd, "tmp", Mode::from_raw_mode(0o1777), AtFlags::empty())
                .about("/tmp")?;
        }
        Ok(points)
    }

    /// Opens a directory at the top of the root, making it if there is nothing of that name.
    fn top_level(&self, name: &str, mode: u32) -> Result<OwnedFd, Failure> {
        match open_directory(self.as_fd(), name) {
            Err(Errno::NOENT) => {
                rustix::fs::mkdirat(&self.fd, name, Mode::from_raw_mode(mode)).about(format!("/{name}"))?;
                give(self.as_fd(), name, self.id_base)?;
                open_directory(self.as_fd(), name).about(format!("/{name}"))
            }
            Err(Errno::LOOP) => {
                Err(Failure::new(libc::ELOOP, format!("/{name} is a symbolic link in the image")))
            }
            other => other.about(format!("/{name}")),
        }
    }

    /// Opens a directory anywhere beneath the root, making what is missing of the path. Symbolic links are followed
    /// as the container itself would, and cannot lead out.
    pub(super) fn directory(&self, path: &str) -> Result<OwnedFd, Failure> {
        let mut reached = String::new();
        let mut here = self.fd.try_clone().about("/")?;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            reached.push('/');
            reached.push_str(name);
            here = match self.resolve(&reached, OFlags::PATH | OFlags::DIRECTORY) {
                Err(Errno::NOENT) => {
                    rustix::fs::mkdirat(&here, name, Mode::from_raw_mode(0o755)).about(&reached)?;
                    give(here.as_fd(), name, self.id_base)?;
                    self.resolve(&reached, OFlags::PATH | OFlags::DIRECTORY).about(&reached)?
                }
                other => other.about(&reached)?,
            };
        }
        Ok(here)
    }

    /// Opens a path as the container would see it.
    pub(super) fn resolve(&self, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&self.fd, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    /// Makes this the root of the mount namespace and lets the host's go.
    pub(super) fn pivot(&self) -> Result<(), Failure> {
        // With "." for both, the old root ends up mounted over the new one and needs no directory in the image.
        rustix::process::fchdir(&self.fd).about("fchdir")?;
        rustix::process::pivot_root(".", ".").about("pivot_root")?;
        rustix::mount::unmount(".", UnmountFlags::DETACH).about("umount the host's root")?;
        rustix::process::chdir("/").about("/")
    }
}

/// Opens a directory by a single name, which must not be a symbolic link nor another mount's root by magic.
pub(super) fn open_directory(parent: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat2(parent, name, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
}

/// Gives a file that we made to the container's root.
pub(super) fn give(parent: BorrowedFd<'_>, name: &str, id: u32) -> Result<(), Failure> {
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    rustix::fs::chownat(parent, name, Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW).about(name)
}
